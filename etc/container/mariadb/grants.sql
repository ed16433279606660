-- Privileges in the MariaDB of compose.yaml. The image has created both users and given the first one all privileges on the
-- database; the filter only needs to read two tables, as in etc/sql/grants.sql.

REVOKE ALL PRIVILEGES ON contentfilter.* FROM 'contentfilter'@'%';
GRANT SELECT ON clamavclients TO 'contentfilter'@'%';
GRANT SELECT ON spamdclients TO 'contentfilter'@'%';
ALTER USER 'contentfilter'@'%' WITH MAX_USER_CONNECTIONS 4;

-- Rows are changed by `docker compose exec --user mysql mariadb mariadb contentfilter`, without a password.
GRANT SELECT, INSERT, UPDATE, DELETE ON contentfilter.* TO 'mysql'@'localhost';
