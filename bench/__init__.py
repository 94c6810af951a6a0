"""What shows and measures compileclip; not installed with it."""
