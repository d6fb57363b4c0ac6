"""The layers models are built from, written for tensor parallelism: each rank holds its share."""
