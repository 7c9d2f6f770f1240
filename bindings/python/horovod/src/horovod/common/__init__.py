"""What the frameworks have in common."""
