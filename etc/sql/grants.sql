-- A user that can only read the recipient tables. Run as root, in the tables' database, after setting your own password;
-- the same password goes into the first line of [mariadb] password_file (owner: the daemon's user, mode 0600).
--
--   mariadb contentfilter < grants.sql
--
-- For a daemon on another machine replace localhost with its address, and add REQUIRE SSL.

CREATE USER IF NOT EXISTS 'contentfilter'@'localhost' IDENTIFIED BY 'change me' WITH MAX_USER_CONNECTIONS 4;

GRANT SELECT ON clamavclients TO 'contentfilter'@'localhost';
GRANT SELECT ON spamdclients TO 'contentfilter'@'localhost';

-- With [mariadb] prefs_table, SpamAssassin's user preferences: see userpref.sql.
