"""Which documents are kept: filters, decontamination, deduplication, and the account of what went."""
