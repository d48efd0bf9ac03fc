"""What a model can do: test loss and perplexity, answers to GSM8K, multiple choice by likelihood."""
