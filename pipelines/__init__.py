"""One thin entry point per stage: recipe in, artifact out."""
