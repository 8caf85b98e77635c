"""gRPC over HTTP/2 and REST: converters between a wire and the seams of the mesh."""
