"""Policies and their blocks: SigLIP, Gemma experts, pi0, and the import and export of published weights."""
