"""Pages of `lavender look`: where a model looks for each word, what a teacher maps, what a map store holds."""
