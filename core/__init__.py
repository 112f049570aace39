"""Everything about the cache that does not depend on an engine, a store or a plugin.

    engine       all of it in one process: lookup, retrieve, store
    attachment   one engine joined to a decider, across processes
      handover     how their processes come to share a slab
    decider      holds the index, the leases and the slots; decides every hit
      index, leases, allocator, eviction
    tiers        storage backends behind the slab: fetched from, written to
      backend, codec   what a plugin implements
      objects          how an object's bytes describe and check themselves
    mover        copies between an engine's pages and the slab; decides nothing
      kernels          runs of bytes, on the host and on devices
      slab             the memory that all of them map
    keys, chain  what a chunk is called
    layout       how an engine lays its pages out
    config       every setting, and where its value came from
    errors       the tree of what is raised on purpose

Imports point down. torch is not imported before an engine hands over its tensors.
"""
