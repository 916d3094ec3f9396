"""Planning without training: shapes that spend what SQA saves, and the cost of large models."""
