"""What was measured, as JSON, tables and plots. Read ``results.py`` first."""
