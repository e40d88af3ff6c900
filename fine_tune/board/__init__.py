"""Many runs in one table: ranked, drawn, and the best one's command."""
