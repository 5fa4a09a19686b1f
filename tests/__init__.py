"""The tests mirror the folders of the code; reference values are in `golden/`, shared helpers in `helpers/`."""
