"""The HTTP server: OpenAI's routes, errors and metrics."""
