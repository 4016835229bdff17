"""The chat loop: conversations in, a model that answers out."""
