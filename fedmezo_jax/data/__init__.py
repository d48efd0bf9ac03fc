"""Instruction data: generated or loaded, tokenised to fixed shapes, dealt to clients, drawn in batches."""
