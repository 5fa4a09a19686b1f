"""What is done to a caption before and after it becomes token ids."""
