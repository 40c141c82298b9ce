"""Where rows come from: files, folders and hubs."""
