"""What several test files share: tiny datasets, models, runs, processes, the demo's weights."""
