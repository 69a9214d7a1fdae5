"""Where drafted tokens come from; one file for each kind of source."""
