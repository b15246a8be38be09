"""What a configuration names becomes objects: checkpoint -> graphs -> runners -> stages."""
