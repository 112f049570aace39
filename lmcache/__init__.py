"""LMCache: keeps KV caches outside the engine that computed them."""
