"""One fit from its parts, and the Trainer that owns the parts.

Knows everything a fit takes; nothing of what is asked of a trained model.
"""
