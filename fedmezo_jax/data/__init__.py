"""Instruction data: generated or loaded, tokenised to fixed shapes, partitioned over clients, drawn in batches."""
