"""Where bytes come from: web servers, folders, object stores, mirrors of each, at a rate and within a budget."""
