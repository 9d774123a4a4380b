"""The two small networks beside a target, the safety head and the draft head: load, bind, publish."""
