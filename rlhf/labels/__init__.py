"""Labels: which pairs to have labelled next, a page to label them on, and what annotators agree about."""
