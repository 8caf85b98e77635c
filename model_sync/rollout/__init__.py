"""What a channel serves: its document, and the pure transitions between documents."""
