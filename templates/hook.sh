# What `monitor hooks install` registers with an agent, joined to one line; @NAMES@ are filled in.
# It posts the payload, prints nothing, ends with 0 and within 2 s; what could not be posted goes to the spool.
# In sh, as some agents use the shell of the user (zsh, fish); hence there is no single quote in it. Gemini puts
# the values of $NAME, ${NAME} and ${NAME:-default} into the text when it reads its settings: hence ${NAME-} for
# what comes from the environment, and odd names for what does not. exec, not a redirection of a group: the
# shell would keep the agent's own pipes open in what goes on in the background.
sh -c ': monitor-hook; exec >/dev/null 2>&1; _s=${MONITOR_SERVER-}; : "${_s:=@SERVER@}"; _s=${_s%/};
_a=${MONITOR_TOKEN-}; _t=${MONITOR_TASK_ID-}; _b=$(cat);
read -r _k </proc/sys/kernel/random/uuid || _k=$(od -An -N8 -tx8 /dev/urandom | tr -d " ");
# The header with the token goes through a pipe, like the payload: else a list of processes would show it.
_p() { printf "Authorization: %s\nX-Monitor-Task: %s\nIdempotency-Key: %s\n" "${_a:+Bearer $_a}" "$_t" "$_k" |
curl -qgs -m 2 -o /dev/null -w "%{http_code}" --noproxy "*" -H @- -H Expect: "$@"; };
_c=$(printf %s "$_b" | _p -H "Content-Type: application/json" --data-binary @/dev/fd/3
"$_s/api/hooks/@AGENT@@QUERY@" 3<&0);
# The folder of this server: in its name _ stands for every byte outside of A-Za-z0-9.-
_n=$_s; while _h=${_n%%[!A-Za-z0-9._-]*}; [ "$_h" != "$_n" ]; do _n=${_h}_${_n#"$_h"?}; done;
_d=${MONITOR_SPOOL-}; _x=${XDG_STATE_HOME-}; : "${_d:=${_x:=${HOME-}/.local/state}/monitor/spool}";
case $_d in off) _c=off ;; esac; _d=$_d/$_n; set -- "$_d"/*.hook;
case $_c in
2??) [ ! -f "$1" ] || { _k= _t=; for _f in $(ls -tr "$_d"); do [ ! -f "$_d/$_f" ] ||
case $(_p -H "Content-Type: application/vnd.monitor.hook" --data-binary @"$_d/$_f" "$_s/api/hooks/spooled")
in 401) break ;; 2??|4??) rm -f "$_d/$_f" ;; *) break ;; esac; done; } & ;;
""|000|401|5??) [ $# -ge 1000 ] || { umask 077; mkdir -p "$_d"; {
printf "agent: @AGENT@\nevent: @EVENT@\ntask: %s\ntime: %s\nkey: %s\n\n" "$_t"
"$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$_k" && printf %s "$_b"; } >"$_d/.$_k" && mv "$_d/.$_k" "$_d/$_k.hook" ||
rm -f "$_d/.$_k"; } ;; esac; exit 0'
