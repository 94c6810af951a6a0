"""What is stepped: shapes, tensors, models, and where float64 arithmetic goes from there."""
