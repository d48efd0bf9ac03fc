"""Evaluation of a model: test loss and perplexity, answers to GSM8K, multiple choice by likelihood."""
