"""What a training stage is made of: losses, optimizer, session, guards and monitoring."""
