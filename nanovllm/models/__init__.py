"""Model families: the registry, and one file a family."""
