"""Text from a trained model: a cache of keys and values, counter-based sampling, the loop over tokens, and the command."""
