"""Preparation of corpora: fetch or find text, verify it, write the on-disk form that metalm reads."""
