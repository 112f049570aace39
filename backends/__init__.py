"""Storage backends and codecs that come with the package: one module each, each a plugin."""
