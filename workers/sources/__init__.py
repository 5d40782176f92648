"""Sources of prompts: each module builds one data set, row by row."""
