"""The data plane: from text to the batch of a step.

What lives here: shards, packing, order, mixtures, objectives, loading; before them `reading`, `keeping`, `preparing`,
and `looking` beside them. What must not: models, torch, the loop.

     files, globs, directories, URLs, hub:NAME, python-stdlib, torch-headers, token files
        |  reading      bytes -> documents, byte for byte; a byte range owns the documents that start in it
        v
     documents
        |  keeping      filters, decontamination, deduplication
        |  preparing    parts of the work, who does it, which documents are held out for validation
        v
     shards             tokens on disk: part-00000.ds (ids) + .ds.index (document ends), and where an objective wants
        |               them .ds.marks (where words and sentences start); verification looks at them
        |  packing      lengths -> a plan: which piece of which document lies in which row
        v
     rows               plan + shards -> ids, positions, document numbers, each (rows, length); or pieces, of which
        |               an objective makes the rows itself (pairs of segments, an encoder-decoder's two rows)
        |  mixture      sample g -> source, in O(1)
        |  order        sample g of a source -> (epoch, row), in O(1)
        |  objectives   rows or pieces + hashed draws -> inputs and targets, one registry
        v
     loader             step -> Batch, a pure function of (data, seed, step)
"""
