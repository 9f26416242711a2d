"""Writes files on disks and in buckets; `storage` picks what fits a path."""
