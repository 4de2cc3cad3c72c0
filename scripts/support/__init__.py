"""What quickstart, bench and the tests share: servers, links and guests under test."""
