{{- define "silotune-coordinator.selector" -}}
app.kubernetes.io/name: silotune-coordinator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "silotune-coordinator.labels" -}}
{{ include "silotune-coordinator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "silotune-coordinator.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* What every container of the pod may do, and where it may write. */}}
{{- define "silotune-coordinator.container" -}}
image: {{ include "silotune-coordinator.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "silotune-coordinator.state" -}}
{{ .Values.state.existingClaim | default (printf "%s-state" .Release.Name) }}
{{- end }}

{{- define "silotune-coordinator.environment" -}}
- {name: SILOTUNE_PASSPHRASE_FILE, value: /run/secrets/silotune/passphrase}
- {name: TZ, value: {{ .Values.timeZone | quote }}}
{{- end }}

{{- define "silotune-coordinator.mounts" -}}
- {name: state, mountPath: /var/lib/silotune}
- {name: passphrase, mountPath: /run/secrets/silotune, readOnly: true}
- {name: temporary, mountPath: /tmp}
{{- end }}
