"""Requests that are answered later: kept on disk from their 202 on, computed in the lane, and fetched when they are done."""
