"""The static files that every node reads: TUF metadata, channel documents, manifests, blobs."""
