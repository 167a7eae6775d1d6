"""What `pretrain report` tells of a run, read from its files. Without torch."""
