"""Where keys and values lie."""
