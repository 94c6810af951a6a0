"""What is compared: each way to clip and step, and the limit. Read ``registry.py`` first."""
