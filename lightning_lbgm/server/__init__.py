"""The server: aggregation of decoded updates, the server optimizer, buffers and the error of compression."""
