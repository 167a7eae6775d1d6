"""The data plane: from text to the batch of a step.

What lives here: documents, shards, packing, order, objectives, loading. What must not: models, torch, the loop.

     files, globs, directories, hub:NAME, python-stdlib
        |  sources      which files, in which order; what a part of the work is
        v
     documents          bytes -> documents, byte for byte; a byte range owns the documents that start in it
        |  splits       which documents are held out for validation
        v
     shards             documents -> tokens on disk: part-00000.ds (ids) + .ds.index (document ends)
        |  packing      lengths -> a plan: which piece of which document lies in which row
        v
     rows               plan + shards -> ids, positions, document numbers, each (rows, length)
        |  order        sample g -> (epoch, row), in O(1)
        |  objectives   rows + hashed draws -> inputs and targets
        v
     loader             step -> Batch, a pure function of (data, seed, step)
"""
