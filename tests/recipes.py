"""Small heads for all methods, in tests and in the judge of refactorings."""

HEADS = """
[byol]
hidden = 64
projection = 32

[simsiam]
projection = 32
hidden = 16

[simclr]
hidden = 32
projection = 16

[barlow_twins]
projection = 32

[vicreg]
projection = 32

[moco_v3]
hidden = 32
projection = 16

[dino]
hidden = 32
prototypes = 64
local_views = 2
local_size = 8
"""
