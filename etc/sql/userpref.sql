-- SpamAssassin's user preferences, and access to them. Run as root in the database of your choice (spamassassin in
-- etc/spamassassin/sql.cf), after grants.sql, and after setting your own password.
--
--   mariadb spamassassin < userpref.sql
--
-- username: user@domain, in lower case; @domain for its other mailboxes; @GLOBAL for everyone.
-- preference, value: as in user_prefs, e.g. required_score 4.0, whitelist_from *@example.org, report_safe 0.

CREATE TABLE IF NOT EXISTS userpref (
    prefid     INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    username   VARCHAR(320) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    preference VARCHAR(64) NOT NULL,
    value      VARCHAR(255) NOT NULL,
    KEY username (username)
) ENGINE = InnoDB;

CREATE USER IF NOT EXISTS 'spamd'@'localhost' IDENTIFIED BY 'change me';
GRANT SELECT ON userpref TO 'spamd'@'localhost';

-- contentfilter reads the user names only.
GRANT SELECT (username) ON userpref TO 'contentfilter'@'localhost';
