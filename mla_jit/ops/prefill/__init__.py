"""Prefill: attention of many query tokens a sequence over K and V in full (un-absorbed form)."""
