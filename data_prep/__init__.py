"""Preparation of corpora: fetch or find text, verify it, write the form that metalm reads."""
