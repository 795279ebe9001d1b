"""The tuned model in use: an async service, measured against other engines, exported, served, and tried by hand."""
